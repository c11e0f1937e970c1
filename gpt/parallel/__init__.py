"""What is applied to a model so that it trains compiled and on several processes; it imports no model."""
