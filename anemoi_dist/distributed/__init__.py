"""How ranks meet, talk and agree."""
