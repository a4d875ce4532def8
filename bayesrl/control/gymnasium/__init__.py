"""Real Gymnasium environments: spaces, vectors of them, behaviour and recorded episodes."""
