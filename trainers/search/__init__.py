"""Search of a folder of images by text and image, in an embedded database (LanceDB; extra `search`)."""
