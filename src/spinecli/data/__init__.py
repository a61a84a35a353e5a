"""Files and hub data sets as rows and as texts, read the same way by every command."""
