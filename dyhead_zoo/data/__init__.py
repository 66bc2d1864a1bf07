"""Pictures and boxes on their way to the model: reading, checking, augmenting, batching. Import from the modules."""
