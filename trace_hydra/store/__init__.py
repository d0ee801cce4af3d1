"""What outlives a run: trained stages, answers and capability records, found again by what decided them."""
