"""From a dataset of any usual shape to encoded batches of image and text prompts."""
