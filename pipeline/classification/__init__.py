"""Classifiers of photographs: insect pests, and training over several scales."""
