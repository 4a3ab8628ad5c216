"""All that can be set or refused: composed by Hydra, checked here, without torch."""
