"""How good the verifier is, and its scores for new rows."""
