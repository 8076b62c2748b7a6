"""The evidence: records of studies on real models, and the page that is made of them."""
