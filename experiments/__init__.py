"""Commands (train, prepare a patient, register) and everything that touches files, clocks and the terminal."""
