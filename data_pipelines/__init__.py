"""From scans and X-rays on disk to training pairs and cases: files, formats, the C-arm simulator and the embedded phantom."""
