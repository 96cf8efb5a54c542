"""Common corruptions: fixed changes of the images, in five severities."""
