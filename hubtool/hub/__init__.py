"""Model hubs: references, a client that explains its failures, verified transfers, headers read from afar, cards, publishing."""
