"""Common corruptions: fixed changes of images at five severities."""
