"""Everything in groupvit that has one meaning, whatever the framework. Imports neither PyTorch nor TensorFlow."""
