"""Split federated learning: devices train the bottom of a model, the server its top on their merged features."""
