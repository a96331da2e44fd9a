"""One adapter a data set, splits, the decoded-image cache and the phantoms."""
