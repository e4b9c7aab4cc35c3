"""`proclip demo`: a page that searches an index of images, in the browser (Gradio; extra `demo`)."""
