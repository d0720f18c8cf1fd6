//! The flags that name the image.

use crate::image::Format;
use crate::io::{CacheMode, IoMode};
use crate::settings::OnError;
use lexopt::{Parser, ValueExt};
use std::ffi::OsString;
use std::fs::OpenOptions as FileOptions;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use vhost_daemon::Limits;
use vm_spec::size::ByteSize;

/// Printed by `--help`.
pub(crate) const USAGE: &str = "  --blk-file=PATH         the image
  --blk-fd=N              the image, already open
  --format=FORMAT         raw, qcow2, or read-only vmdk, vdi, vhdx, vhd; never guessed
  --backing=FORMAT:PATH   a backing file; once for each, from the image downwards
  --backing-fd=FORMAT:N   the same, already open
  --data-file=PATH        the image's external data file (qcow2)
  --data-file-fd=N        the same, already open
  --key-fd=N              the passphrase of an encrypted image (LUKS in qcow2), read to its end
  --l2-cache-size=SIZE    memory for mapping tables, for each layer; 64K to 1G, default 8M
  --cache=MODE            writeback (default), or none: past the host's page cache (O_DIRECT)
  --blk-direct-fd=N       with --blk-fd and --cache=none: the same file, open with O_DIRECT
  --io=MODE               auto (default), sync or uring; auto takes io_uring where a call would wait for the disk
  --read-only             the guest cannot write
  --serial=TEXT           what GET_ID answers; at most 20 bytes
  --limit=LIMITS          ops=N,bytes=SIZE a second, with bursts ops-burst=N,bytes-burst=SIZE; all
                          queues together
  --on-error=WHAT         when the host has no space or a disk fails: report (default) it to the
                          guest, or stop the queue and try again until it succeeds
  --writes-lost           the host failed to write back what a predecessor wrote: no flush succeeds
  --control-fd=N          take orders from this socket, a line each: size BYTES, metrics
";

/// Bytes of a disk's serial number (virtio 1.3, 5.2.6: VIRTIO_BLK_T_GET_ID).
pub(crate) const SERIAL_LENGTH: usize = 20;

/// Where a file is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// By path: opened here.
    Path(PathBuf),
    /// Already open at exec.
    Fd(RawFd),
}

impl Place {
    /// Opens or takes the file.
    pub(crate) fn open(&self, read_only: bool) -> io::Result<OwnedFd> {
        self.open_with(read_only, 0)
    }

    /// As [`Self::open`]; `flags` are further ones for `open`.
    pub(crate) fn open_with(&self, read_only: bool, flags: i32) -> io::Result<OwnedFd> {
        match self {
            Self::Path(path) => FileOptions::new()
                .read(true)
                .write(!read_only)
                .custom_flags(flags)
                .open(path)
                .map(Into::into),
            Self::Fd(number) => vhost_daemon::inherited(*number),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            // The number means nothing to who reads the log of a VM.
            Self::Fd(_) => f.write_str("the file that was passed"),
        }
    }
}

/// What the command line says about the image.
#[derive(Clone, Default, Debug)]
pub struct Options {
    pub(crate) image: Option<Place>,
    pub(crate) format: Option<Format>,
    pub(crate) backing: Vec<(Format, Place)>,
    pub(crate) data_file: Option<Place>,
    pub(crate) key: Option<RawFd>,
    pub(crate) l2_cache_size: Option<usize>,
    pub(crate) cache: CacheMode,
    pub(crate) direct: Option<RawFd>,
    pub(crate) io: IoMode,
    pub(crate) read_only: bool,
    pub(crate) serial: Vec<u8>,
    pub(crate) limits: Limits,
    pub(crate) on_error: OnError,
    pub(crate) control: Option<RawFd>,
    pub(crate) writes_lost: bool,
}

impl Options {
    /// Takes one flag; false if it is none of this program's.
    pub(crate) fn take(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "blk-file" => self.set_image(Place::Path(parser.value()?.into()))?,
            "blk-fd" => self.set_image(Place::Fd(parser.value()?.parse()?))?,
            "format" => self.format = Some(parser.value()?.parse()?),
            "backing" => {
                let (format, path) = layer(parser.value()?)?;
                self.backing.push((format, Place::Path(path.into())));
            }
            "backing-fd" => {
                let (format, number) = layer(parser.value()?)?;
                self.backing.push((format, Place::Fd(number.parse()?)));
            }
            "data-file" => self.data_file = Some(Place::Path(parser.value()?.into())),
            "data-file-fd" => self.data_file = Some(Place::Fd(parser.value()?.parse()?)),
            "key-fd" => self.key = Some(parser.value()?.parse()?),
            "l2-cache-size" => self.l2_cache_size = Some(parser.value()?.parse_with(cache_size)?),
            "cache" => self.cache = parser.value()?.parse()?,
            "blk-direct-fd" => self.direct = Some(parser.value()?.parse()?),
            "io" => self.io = parser.value()?.parse()?,
            "read-only" => self.read_only = true,
            "serial" => self.serial = serial(parser.value()?)?,
            "limit" => self.limits = parser.value()?.parse_with(|text| Limits::parse(text, "ops"))?,
            "on-error" => self.on_error = parser.value()?.parse()?,
            "writes-lost" => self.writes_lost = true,
            "control-fd" => self.control = Some(parser.value()?.parse()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What the flags leave out.
    pub(crate) fn check(&self) -> Result<(), lexopt::Error> {
        if self.image.is_none() {
            return Err("one of --blk-file and --blk-fd is needed".into());
        }
        if self.format.is_none() {
            return Err(
                "--format is needed, such as raw or qcow2 (--help lists them); it is never guessed".into(),
            );
        }
        let by_fd = matches!(self.image, Some(Place::Fd(_)));
        if self.direct.is_some() != (by_fd && self.cache == CacheMode::None) {
            return Err("--blk-direct-fd goes with --blk-fd and --cache=none, and they with it".into());
        }
        Ok(())
    }

    fn set_image(&mut self, place: Place) -> Result<(), lexopt::Error> {
        match self.image.replace(place) {
            None => Ok(()),
            Some(_) => Err("--blk-file and --blk-fd exclude each other, and each is given once".into()),
        }
    }
}

/// `FORMAT:REST`; paths need not be UTF-8.
fn layer(value: OsString) -> Result<(Format, OsString), lexopt::Error> {
    let mut bytes = value.into_vec();
    let colon = bytes.iter().position(|byte| *byte == b':');
    let colon = colon.ok_or("a backing file is written FORMAT:PATH or FORMAT:N, such as raw:base.img")?;
    let rest = bytes.split_off(colon + 1);
    bytes.truncate(colon);
    let format = OsString::from_vec(bytes).parse()?;
    Ok((format, OsString::from_vec(rest)))
}

/// As in a spec; from one set of the cache to what a process may sensibly hold.
fn cache_size(text: &str) -> Result<usize, &'static str> {
    let size = text.parse::<ByteSize>().ok();
    size.and_then(|size| usize::try_from(size.0).ok())
        .filter(|size| (64 << 10..=1 << 30).contains(size))
        .ok_or("expected 64K to 1G")
}

fn serial(value: OsString) -> Result<Vec<u8>, lexopt::Error> {
    let bytes = value.into_vec();
    if bytes.len() > SERIAL_LENGTH {
        return Err(format!("--serial is longer than {SERIAL_LENGTH} bytes").into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, lexopt::Error> {
        let mut parser = Parser::from_args(arguments);
        let mut options = Options::default();
        while let Some(lexopt::Arg::Long(name)) = parser.next()? {
            let name = name.to_owned();
            assert!(options.take(&name, &mut parser)?, "{name}");
        }
        Ok(options)
    }

    #[test]
    fn reads_an_image_and_its_layers_in_order() {
        let options = parse(&[
            "--blk-fd=4",
            "--format=qcow2",
            "--backing-fd=qcow2:5",
            "--backing=raw:a:b.img",
            "--data-file-fd=6",
            "--key-fd=7",
            "--l2-cache-size=1M",
            "--read-only",
            "--serial=disk-1",
        ]);
        let options = options.unwrap();
        assert_eq!(options.image, Some(Place::Fd(4)));
        assert_eq!(options.format, Some(Format::Qcow2));
        let layers = vec![
            (Format::Qcow2, Place::Fd(5)),
            (Format::Raw, Place::Path("a:b.img".into())),
        ];
        assert_eq!(options.backing, layers);
        assert_eq!(options.data_file, Some(Place::Fd(6)));
        assert_eq!(options.key, Some(7));
        assert_eq!(options.l2_cache_size, Some(1 << 20));
        assert!(options.read_only);
        assert_eq!(options.serial, b"disk-1");
    }

    #[test]
    fn says_what_is_wrong() {
        let message = |arguments: &[&str]| parse(arguments).unwrap_err().to_string();
        assert!(message(&["--format=dmg"]).contains("dmg"));
        assert!(message(&["--backing=base.img"]).contains("FORMAT:PATH"));
        assert!(message(&["--blk-file=a", "--blk-fd=3"]).contains("exclude each other"));
        for size in ["1K", "2000M", "18446744073709551615M", "M", ""] {
            assert!(message(&[&format!("--l2-cache-size={size}")]).contains("64K to 1G"));
        }
        assert_eq!(
            parse(&["--l2-cache-size=1G"]).unwrap().l2_cache_size,
            Some(1 << 30)
        );
        assert!(message(&["--limit=packets=1"]).contains("ops-burst"));
        assert!(message(&["--on-error=ignore"]).contains("report or stop"));
        assert!(message(&["--serial=123456789012345678901"]).contains("20 bytes"));
    }
}
