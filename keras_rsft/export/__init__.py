"""A trained model -> what TensorFlow Serving, LiteRT and ONNX Runtime load."""
