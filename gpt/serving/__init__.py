"""An HTTP server of a trained model, in the form of OpenAI's API."""
