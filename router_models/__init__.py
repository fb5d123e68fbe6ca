"""The learned complexity router: records, features, classifier, training. A leaf; nothing of it is built yet."""
