"""Programs: training, preparing a patient, registering, and what they write."""
