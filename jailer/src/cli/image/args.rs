//! `bulkhead image`'s arguments.

use crate::cli::values;
use crate::failure::Failure;
use crate::sandbox::SeccompMode;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use vm_spec::size::ByteSize;
use vm_spec::spec::ImageFormat;

/// `bulkhead image`'s verbs.
#[derive(Subcommand, Debug)]
pub(in crate::cli) enum ImageVerb {
    /// Say what an image is
    Info {
        #[command(flatten)]
        image: ImageArgs,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check a qcow2 image; exits 0 if it is sound, 2 if it is corrupt, 3 if it leaks space only, 1 if it could
    /// not be checked
    Check {
        #[command(flatten)]
        image: ImageArgs,
        /// Count the references anew if they are wrong
        #[arg(long, short)]
        repair: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make an empty raw or qcow2 image
    #[command(
        mut_arg("format", |format| format.help("Its format: raw or qcow2 (default: by its name)")),
        mut_arg("key_file", |key| key.hide(true)),
        mut_arg("key_fd", |key| key.hide(true))
    )]
    Create {
        #[command(flatten)]
        image: ImageArgs,
        /// Size of the disk, such as 20G (default: the backing file's)
        size: Option<ByteSize>,
        /// The image that shows through where nothing was written, as the new image is to name it
        #[arg(long, short, value_name = "FILE", requires = "backing_format")]
        backing: Option<PathBuf>,
        /// Format of the backing file
        #[arg(long, short = 'F', value_name = "FORMAT", requires = "backing", value_parser = parse_format)]
        backing_format: Option<ImageFormat>,
        #[command(flatten)]
        shape: Shape,
        /// Let QEMU write refcounts late
        #[arg(long)]
        lazy_refcounts: bool,
    },
    /// Copy a disk into a new image
    Convert {
        #[command(flatten)]
        image: ImageArgs,
        /// The new image
        target: PathBuf,
        /// The image's external data file: its name in a qcow2 image is never used
        #[arg(long, value_name = "FILE")]
        data_file: Option<PathBuf>,
        /// The new image's format: raw or qcow2 (default: by its name)
        #[arg(long, short = 'O', value_name = "FORMAT", value_parser = parse_format)]
        output_format: Option<ImageFormat>,
        #[command(flatten)]
        shape: Shape,
    },
    /// List, take, apply or delete internal snapshots of a qcow2 image
    Snapshot {
        #[command(flatten)]
        image: ImageArgs,
        #[command(flatten)]
        action: SnapshotAction,
        /// Print the list as JSON
        #[arg(long, conflicts_with_all = ["create", "apply", "delete"])]
        json: bool,
    },
    /// Make a disk larger, or smaller with --shrink
    Resize {
        #[command(flatten)]
        image: ImageArgs,
        /// The new size, or +SIZE or -SIZE for a change
        #[arg(allow_hyphen_values = true)]
        size: String,
        /// Allow what lies behind the new end to be lost
        #[arg(long)]
        shrink: bool,
    },
}

impl ImageVerb {
    /// What all verbs share.
    pub(super) fn image(&self) -> &ImageArgs {
        match self {
            Self::Info { image, .. }
            | Self::Check { image, .. }
            | Self::Create { image, .. }
            | Self::Convert { image, .. }
            | Self::Snapshot { image, .. }
            | Self::Resize { image, .. } => image,
        }
    }
}

/// The image, and how to open it.
#[derive(Args, Debug)]
pub(in crate::cli) struct ImageArgs {
    /// The image
    pub(super) file: PathBuf,
    /// Its format: raw, qcow2, vmdk, vdi, vhdx or vhd (default: by its name; never by its content)
    #[arg(long, short, value_name = "FORMAT", value_parser = parse_format)]
    pub(super) format: Option<ImageFormat>,
    /// Folder that backing files may lie in, beside the image's own
    #[arg(long, value_name = "FOLDER")]
    pub(super) image_folder: Vec<PathBuf>,
    /// File with the passphrase of an encrypted image, taken whole
    #[arg(long, value_name = "FILE")]
    pub(super) key_file: Option<PathBuf>,
    /// The same, by inherited file descriptor, which may be a pipe
    #[arg(long, value_name = "N", conflicts_with = "key_file")]
    pub(super) key_fd: Option<i32>,
    /// What becomes of a system call that no policy allows: enforce, trap, log or off
    #[arg(long, value_name = "MODE", default_value_t = SeccompMode::Enforce, value_parser = values::seccomp(),
        hide_possible_values = true)]
    pub(super) seccomp: SeccompMode,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Shape {
    /// Bytes of a qcow2 cluster: a power of two from 512 to 2M
    #[arg(long, value_name = "SIZE")]
    pub(super) cluster_size: Option<ByteSize>,
}

impl Shape {
    /// The image tool's flag, for a new image of `format`.
    pub(super) fn flag(&self, format: ImageFormat) -> Result<Option<String>, Failure> {
        let Some(size) = self.cluster_size else {
            return Ok(None);
        };
        if format != ImageFormat::Qcow2 {
            return Err(Failure::usage("--cluster-size: only a qcow2 image has clusters"));
        }
        let bytes = size.0;
        if !bytes.is_power_of_two() {
            return Err(Failure::usage(format!(
                "--cluster-size: {bytes} is no power of two"
            )));
        }
        Ok(Some(format!("--cluster-bits={}", bytes.trailing_zeros())))
    }
}

#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub(in crate::cli) struct SnapshotAction {
    /// List them
    #[arg(long, short)]
    pub(super) list: bool,
    /// Take one with this name
    #[arg(long, short, value_name = "NAME")]
    pub(super) create: Option<String>,
    /// Make the disk what it was when this one, by id or name, was taken
    #[arg(long, short, value_name = "SNAPSHOT")]
    pub(super) apply: Option<String>,
    /// Delete this one, by id or name
    #[arg(long, short, value_name = "SNAPSHOT")]
    pub(super) delete: Option<String>,
}

fn parse_format(text: &str) -> Result<ImageFormat, String> {
    ImageFormat::named(text).ok_or_else(|| {
        let known = ImageFormat::ALL.map(ImageFormat::name).join(", ");
        format!("expected one of {known}")
    })
}
