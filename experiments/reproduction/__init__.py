"""All studies as one run, and the papers' tables and figures beside their results."""
