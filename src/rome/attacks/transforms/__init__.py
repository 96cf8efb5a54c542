"""Attacks that transform the image: fog, snow, Gabor noise, JPEG, elastic deformation, patches, flows, colours."""
