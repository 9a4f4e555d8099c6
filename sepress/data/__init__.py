"""Images by name -> datasets and batches: the embedded digits, torchvision's sets, folders of images."""

from sepress.data.loading import ImageDataset, Loader, make_loader
from sepress.data.sources import DataSource, open_data
from sepress.data.spec import DataSpec

__all__ = ["DataSpec", "DataSource", "open_data", "ImageDataset", "Loader", "make_loader"]
