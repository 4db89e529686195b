"""Evaluation: classification with several views of a video, features of a frozen encoder, probes."""
