"""What any trainer needs and MONAI lacks: losses, checkpoints, averaging, history, TensorBoard."""
