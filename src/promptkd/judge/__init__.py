"""A language model as judge of answers: what is asked, of whom, what its verdicts mean and come to."""
