"""The posterior exactly: enumeration, dynamic programming along time, backward induction against nature."""
