"""Folds: fold files, and the schedule that they and the datasets on disk define."""
