"""Diagnosis of an installation: what is found, what is missing, and what that is needed for."""
