"""One run, from data to a trained model and its folder."""
