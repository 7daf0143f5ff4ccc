"""Solutions that are kept for later runs, and the key of what each was solved for."""
