"""Media types and the annotations and labels of Nydus images."""

from __future__ import annotations

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_FOREIGN_LAYER = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
NYDUS_CONFIG = "application/vnd.nydus.image.config.v1+json"
NYDUS_MANIFEST_ARTIFACT = "application/vnd.nydus.image.manifest.v1+json"

INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
ACCEPT_MANIFESTS = ", ".join((OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST))

_PREFIX = "containerd.io/snapshot/"
ANNOTATION_BLOB = _PREFIX + "nydus-blob"
ANNOTATION_BOOTSTRAP = _PREFIX + "nydus-bootstrap"
ANNOTATION_FS_VERSION = _PREFIX + "nydus-fs-version"
ANNOTATION_BUILDER_VERSION = _PREFIX + "nydus-builder-version"
ANNOTATION_SOURCE_DIGEST = _PREFIX + "nydus-source-digest"
ANNOTATION_SOURCE_REFERENCE = _PREFIX + "nydus-source-reference"
ANNOTATION_CACHE_VERSION = _PREFIX + "nydus-cache-version"
ANNOTATION_EMPTY_LAYER = _PREFIX + "nydus-empty-layer"
ANNOTATION_REF = _PREFIX + "nydus-ref"
ANNOTATION_ENCRYPTED = _PREFIX + "nydus-encrypted-blob"
ANNOTATION_COMMIT_BLOBS = _PREFIX + "nydus-commit-blobs"  # digests of the layers that commits added, with commas
ANNOTATION_PREFETCH_BLOB = _PREFIX + "nydus-separated-blob-with-prefetch-files"  # hex of the layer `optimize` added
ANNOTATION_UNCOMPRESSED = "containerd.io/uncompressed"
# os.features entry of Nydus descriptors in merged indexes before v2.3.5
OS_FEATURE_NYDUS = "nydus.remoteimage.v1"
