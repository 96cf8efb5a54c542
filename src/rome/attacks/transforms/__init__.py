"""Attacks that transform the image: fog, snow, Gabor noise, JPEG, elastic, patches, flows, colours."""
