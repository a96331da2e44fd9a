"""Where files lie: folders, object stores, who may write them."""
