//! Opening images: the one that the spec names, and what lies behind it, below the folders that a person
//! allowed.

use super::disk::{Disk, Key};
use super::inputs::unopened;
use super::machine::Device;
use super::qcow2;
use crate::failure::Failure;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use vm_spec::image::MAX_CHAIN;
use vm_spec::spec::{ImageFormat, VmSpec};

const SECTOR: u64 = 512;

/// One image of a chain.
pub(crate) struct Layer {
    pub(crate) format: ImageFormat,
    pub(crate) path: PathBuf,
    pub(crate) file: OwnedFd,
}

/// What an image is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// It is held against others.
    Use,
    /// Others may have it, and go on.
    Look,
}

/// The image and its backing files, the top first.
pub(super) fn open_chain(
    spec: &VmSpec,
    device: &Device,
    disk: &Disk,
    purpose: Purpose,
) -> Result<Vec<Layer>, Failure> {
    let (field, path) = (format!("{}.path", device.field), disk.path.as_path());
    let top = open_image_for(purpose, &field, path, disk.read_only)?;
    if disk.format == ImageFormat::Raw {
        has_sectors(&field, path, &top)?;
    }
    let own_folder = folder_of(&field, path)?;
    let mut allowed = vec![own_folder.clone()];
    for folder in &spec.image_folders {
        allowed.push(folder.canonicalize().map_err(|e| {
            Failure::host(format!("image-folders: cannot use {}", folder.display())).because(&e)
        })?);
    }
    let mut layers = vec![Layer {
        format: disk.format,
        path: path.to_owned(),
        file: top.into(),
    }];
    let mut folder = own_folder;
    while let Some(layer) = layers.last()
        && layer.format == ImageFormat::Qcow2
    {
        let wants = read_header(&field, layer)?;
        if layers.len() == 1 {
            check_given(&device.field, disk, &wants)?;
        }
        let Some(backing) = wants.backing else { break };
        if layers.len() == MAX_CHAIN {
            return Err(Failure::host(format!(
                "{field}: the backing chain of {} is longer than {MAX_CHAIN} images",
                path.display()
            )));
        }
        let wanted = lexical_join(&folder, Path::new(&backing.name));
        let file = find_backing(&field, &allowed, &wanted, &backing.name, "image-folders")?;
        if purpose == Purpose::Use {
            lock(&field, &wanted, &file, true)?;
        }
        folder = wanted.parent().unwrap_or(Path::new("/")).to_owned();
        layers.push(Layer {
            format: backing.format,
            path: wanted,
            file: file.into(),
        });
    }
    Ok(layers)
}

/// Opens a backing file that an image calls `name` at `wanted`, below one of `allowed`, and holds it against
/// those who would write it; `option` is how a person allows more.
pub(crate) fn open_backing(
    field: &str,
    allowed: &[PathBuf],
    wanted: &Path,
    name: &str,
    option: &str,
) -> Result<File, Failure> {
    let file = find_backing(field, allowed, wanted, name, option)?;
    lock(field, wanted, &file, true)?;
    Ok(file)
}

fn find_backing(
    field: &str,
    allowed: &[PathBuf],
    wanted: &Path,
    name: &str,
    option: &str,
) -> Result<File, Failure> {
    let failed = || Failure::host(format!("{field}: cannot open the backing file '{name}'"));
    let file = open_below(allowed, wanted).map_err(|e| match e {
        BelowError::Outside => failed()
            .cause("it lies outside the folders that images may lie in")
            .hint(format!(
                "name its folder in {option}, or move it beside the image"
            )),
        BelowError::Open(e) => failed().because(&e),
    })?;
    is_image(&file, failed)?;
    Ok(file)
}

fn read_header(field: &str, layer: &Layer) -> Result<qcow2::Wants, Failure> {
    let failed = || {
        Failure::host(format!(
            "{field}: {} is no qcow2 image that can be used",
            layer.path.display()
        ))
    };
    let file = layer.file.try_clone().map_err(|e| failed().because(&e))?;
    let mut front = vec![0; qcow2::FRONT];
    let n = File::from(file)
        .read_at(&mut front, 0)
        .map_err(|e| failed().because(&e))?;
    qcow2::wants(&front[..n]).map_err(|e| {
        let hint = match e {
            qcow2::HeaderError::NoMagic => "check the format: qemu-img info, then format=raw",
            qcow2::HeaderError::NoBackingFormat => {
                "name it in the image: qemu-img rebase -u -b BASE -F FORMAT IMAGE"
            }
            _ => "qemu-img check tells more",
        };
        failed().because(&e).hint(hint)
    })
}

/// Whether the spec has what the image wants, and nothing else.
fn check_given(field: &str, disk: &Disk, wants: &qcow2::Wants) -> Result<(), Failure> {
    let path = disk.path.display();
    let key = disk.key.as_ref().map(|key| match key {
        Key::File(_) => "key-file",
        Key::Inherited(_) => "key-fd",
    });
    match (key, wants.crypt_method) {
        (Some(key), 0) => Err(Failure::host(format!("{field}.{key}: {path} is not encrypted"))),
        (None, qcow2::LUKS) => Err(Failure::host(format!("{field}.path: {path} is encrypted"))
            .cause("no passphrase is given")
            .hint("add key-file=FILE, or key-fd=N")),
        _ => Ok(()),
    }?;
    match (&disk.data_file, wants.data_file) {
        (Some(_), false) => Err(Failure::host(format!("{field}.data-file: {path} has none"))
            .cause("its data is in the image itself")),
        (None, true) => Err(
            Failure::host(format!("{field}.path: {path} keeps its data in another file"))
                .cause("none is given, and the name that the image has for it is never used")
                .hint("add data-file=FILE"),
        ),
        _ => Ok(()),
    }
}

/// Opens an image, and holds it against others.
pub(crate) fn open_image(field: &str, path: &Path, read_only: bool) -> Result<File, Failure> {
    open_image_for(Purpose::Use, field, path, read_only)
}

/// Opens an image as what it is opened for takes.
pub(super) fn open_image_for(
    purpose: Purpose,
    field: &str,
    path: &Path,
    read_only: bool,
) -> Result<File, Failure> {
    let failed = || Failure::host(format!("{field}: cannot open {}", path.display()));
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| unopened(failed(), path, &e))?;
    is_image(&file, failed)?;
    if purpose == Purpose::Use {
        lock(field, path, &file, read_only)?;
    }
    Ok(file)
}

/// A raw image is the disk itself, which has whole sectors.
fn has_sectors(field: &str, path: &Path, file: &File) -> Result<(), Failure> {
    let failed = || Failure::host(format!("{field}: {} is no raw disk", path.display()));
    let about = file.metadata().map_err(|e| failed().because(&e))?;
    let length = about.len();
    if !about.is_file() || (length > 0 && length.is_multiple_of(SECTOR)) {
        return Ok(());
    }
    let cause = format!("it has {length} bytes, and a disk has whole sectors of {SECTOR}");
    Err(failed().cause(cause).hint("check the path and the format"))
}

/// No folder, say, by which a jailed process would reach what lies below it.
fn is_image(file: &File, failed: impl Fn() -> Failure) -> Result<(), Failure> {
    let kind = file.metadata().map_err(|e| failed().because(&e))?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else {
        Err(failed().cause("it is neither a regular file nor a block device"))
    }
}

/// Holds off a second VM on the same image. The lock is the open file description's: it lives as long as any copy of
/// the descriptor, the device process's among them.
fn lock(field: &str, path: &Path, file: &File, shared: bool) -> Result<(), Failure> {
    let failed = || Failure::host(format!("{field}: {} is in use", path.display()));
    let locked = match shared {
        true => file.try_lock_shared(),
        false => file.try_lock(),
    };
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(failed()
            .cause("another process has locked it")
            .hint("stop the other VM, or give each its own overlay")),
        Err(TryLockError::Error(e)) => match e.raw_os_error().map(Errno::from_raw) {
            // A file system without locks.
            Some(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOLCK) => Ok(()),
            _ => Err(failed().because(&e)),
        },
    }
}

pub(crate) fn folder_of(field: &str, path: &Path) -> Result<PathBuf, Failure> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    parent.unwrap_or(Path::new(".")).canonicalize().map_err(|e| {
        Failure::host(format!("{field}: cannot find the folder of {}", path.display())).because(&e)
    })
}

/// `name` seen from the absolute `folder`, with `.` and `..` resolved by text alone: links are
/// not followed when it is opened either.
pub(crate) fn lexical_join(folder: &Path, name: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in folder.join(name).components() {
        match part {
            Component::ParentDir => {
                out.pop();
            }
            Component::CurDir => {}
            other => out.push(other),
        }
    }
    out
}

enum BelowError {
    Outside,
    Open(io::Error),
}

/// Opens `path` for reading, below the first of `allowed` that contains it, following no link.
fn open_below(allowed: &[PathBuf], path: &Path) -> Result<File, BelowError> {
    let (folder, rest) = allowed
        .iter()
        .find_map(|folder| Some((folder, path.strip_prefix(folder).ok()?)))
        .ok_or(BelowError::Outside)?;
    let folder = File::open(folder).map_err(BelowError::Open)?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    match openat2(folder.as_fd(), rest, how) {
        Ok(fd) => Ok(File::from(fd)),
        Err(Errno::ELOOP | Errno::EXDEV) => Err(BelowError::Outside),
        Err(e) => Err(BelowError::Open(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_gets_the_key_and_the_data_file_that_it_wants() {
        let (key, data) = (Some(Key::Inherited(5)), Some(PathBuf::from("d")));
        let refusal = |key, data_file, crypt_method, wanted| {
            let disk = Disk {
                path: "a.qcow2".into(),
                format: ImageFormat::Qcow2,
                read_only: false,
                key,
                data_file,
                past_cache: false,
                flags: Vec::new(),
            };
            let wants = qcow2::Wants {
                backing: None,
                crypt_method,
                data_file: wanted,
            };
            check_given("disk[0]", &disk, &wants)
                .err()
                .map(|failure| failure.to_string())
        };
        assert_eq!(refusal(None, None, 0, false), None);
        assert_eq!(refusal(key.clone(), data.clone(), qcow2::LUKS, true), None);
        let wrong = [
            (
                refusal(key.clone(), None, 0, false),
                "disk[0].key-fd: a.qcow2 is not encrypted",
            ),
            (
                refusal(None, None, qcow2::LUKS, false),
                "disk[0].path: a.qcow2 is encrypted",
            ),
            (
                refusal(None, data, 0, false),
                "disk[0].data-file: a.qcow2 has none",
            ),
            (refusal(None, None, 0, true), "add data-file=FILE"),
        ];
        for (refusal, words) in wrong {
            let refusal = refusal.expect(words);
            assert!(refusal.contains(words), "{refusal}");
        }
    }
}
