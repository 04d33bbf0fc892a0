"""CTs and their label maps: reading, extraction of single vertebrae, and the body around them."""
