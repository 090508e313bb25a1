"""Replaced functions of torch and megatron-core, one module for each replacement.

Every module states what it replaces, why, and when it can be removed. ``tests/patches`` runs the
original functions and fails as soon as one of the replacements is no longer needed.
"""
