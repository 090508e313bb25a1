"""The fold schedule: fold files, resolved against the datasets on disk."""
