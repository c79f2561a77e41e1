"""What the host code of several backends shares."""
