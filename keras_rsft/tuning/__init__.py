"""The search for threshold and learning rate with Keras Tuner."""
