"""What is done with a detector: training, evaluation, prediction, measurement. Import from the modules."""
