"""English text to measure and fit with: the prose that is shipped in three disjoint splits, and a user's own files.

`documents("evaluation")` gives the shipped passages, `read_documents(["notes.txt"])` a user's; both are lists of
`Document`, each of about a chapter's length, so that a bootstrap over documents has many to draw from. What is in the
corpus, under which licence, and how it was split: `docs/text.md`. Nothing here needs torch.
"""

from neuroweave.text.documents import SPLITS, Document, documents
from neuroweave.text.reading import read_documents

__all__ = ["SPLITS", "Document", "documents", "read_documents"]
