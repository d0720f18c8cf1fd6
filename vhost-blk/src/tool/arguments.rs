//! The tool's command line, which the launcher writes.

use std::os::fd::RawFd;
use std::sync::Arc;

use jailer::sandbox::SeccompMode;
use lexopt::{Arg, Parser, ValueExt};

use super::{Files, Reports, ToolError, passphrase};
use crate::image::qcow2::{CreateOptions, Repair};
use crate::image::{Format, OpenOptions};

/// What to do.
pub(super) enum Job {
    Info,
    Check(Repair),
    Create(Create),
    /// To this format, in clusters of two to this power.
    Convert(Format, Option<u32>),
    Snapshot(Snapshot),
    Resize {
        size: u64,
        shrink: bool,
    },
}

pub(super) enum Snapshot {
    Take(String),
    Apply(String),
    Delete(String),
}

/// `create`'s choices.
#[derive(Default)]
pub(super) struct Create {
    pub(super) size: Option<u64>,
    pub(super) cluster_bits: Option<u32>,
    pub(super) lazy_refcounts: bool,
    pub(super) backing: Option<(String, Format)>,
}

impl Create {
    pub(super) fn into_qcow2(self) -> CreateOptions {
        let defaults = CreateOptions::of_size(self.size.unwrap_or(0));
        CreateOptions {
            cluster_bits: self.cluster_bits.unwrap_or(defaults.cluster_bits),
            lazy_refcounts: self.lazy_refcounts,
            backing: self.backing,
            ..defaults
        }
    }
}

/// The command line.
pub(super) struct Arguments {
    pub(super) job: Job,
    pub(super) seccomp: SeccompMode,
    control: RawFd,
    image: RawFd,
    format: Format,
    backing: Vec<(Format, RawFd)>,
    data_file: Option<RawFd>,
    key: Option<RawFd>,
    target: Option<RawFd>,
    read_only: bool,
}

impl Arguments {
    /// Reads `VERB --flag=value...`.
    pub(super) fn parse(mut parser: Parser) -> Result<Self, lexopt::Error> {
        let verb = match parser.next()? {
            Some(Arg::Value(verb)) => verb.string()?,
            _ => return Err("the verb is missing".into()),
        };
        let (mut control, mut image, mut format) = (None, None, None);
        let (mut backing, mut data_file, mut key, mut target) = (Vec::new(), None, None, None);
        let (mut read_only, mut shrink, mut repair) = (false, false, Repair::No);
        let (mut create, mut snapshot, mut to) = (Create::default(), None, None);
        let mut seccomp = SeccompMode::default();
        while let Some(argument) = parser.next()? {
            let Arg::Long(name) = argument else {
                return Err(argument.unexpected());
            };
            match name {
                "control-fd" => control = Some(parser.value()?.parse()?),
                "image-fd" => image = Some(parser.value()?.parse()?),
                "format" => format = Some(parser.value()?.parse()?),
                "backing-fd" => {
                    let text = parser.value()?.string()?;
                    let (format, number) = text.split_once(':').ok_or("expected FORMAT:N")?;
                    let number = number.parse().map_err(|_| "expected FORMAT:N")?;
                    backing.push((
                        format.parse().map_err(|e| lexopt::Error::Custom(Box::new(e)))?,
                        number,
                    ));
                }
                "data-file-fd" => data_file = Some(parser.value()?.parse()?),
                "key-fd" => key = Some(parser.value()?.parse()?),
                "target-fd" => target = Some(parser.value()?.parse()?),
                "target-format" => to = Some(parser.value()?.parse()?),
                "read-only" => read_only = true,
                "repair" => repair = Repair::Refcounts,
                "size" => create.size = Some(parser.value()?.parse()?),
                "cluster-bits" => create.cluster_bits = Some(parser.value()?.parse()?),
                "lazy-refcounts" => create.lazy_refcounts = true,
                "backing-name" => {
                    let text = parser.value()?.string()?;
                    let (format, name) = text.split_once(':').ok_or("expected FORMAT:NAME")?;
                    let format = format.parse().map_err(|e| lexopt::Error::Custom(Box::new(e)))?;
                    create.backing = Some((name.to_owned(), format));
                }
                "take" => snapshot = Some(Snapshot::Take(parser.value()?.string()?)),
                "apply" => snapshot = Some(Snapshot::Apply(parser.value()?.string()?)),
                "delete" => snapshot = Some(Snapshot::Delete(parser.value()?.string()?)),
                "shrink" => shrink = true,
                "seccomp" => seccomp = parser.value()?.parse()?,
                _ => return Err(Arg::Long(name).unexpected()),
            }
        }
        let job = match verb.as_str() {
            "info" => Job::Info,
            "check" => Job::Check(repair),
            "create" => Job::Create(create),
            "convert" => Job::Convert(to.ok_or("--target-format is missing")?, create.cluster_bits),
            "snapshot" => Job::Snapshot(snapshot.ok_or("one of --take, --apply and --delete is missing")?),
            "resize" => Job::Resize {
                size: create.size.ok_or("--size is missing")?,
                shrink,
            },
            _ => return Err("unknown verb".into()),
        };
        Ok(Self {
            job,
            seccomp,
            control: control.ok_or("--control-fd is missing")?,
            image: image.ok_or("--image-fd is missing")?,
            format: format.ok_or("--format is missing")?,
            backing,
            data_file,
            key,
            target,
            read_only,
        })
    }

    /// Takes the descriptors, and reads the passphrase; nothing of an image is read.
    pub(super) fn take_descriptors(&mut self) -> Result<(Reports, Files), ToolError> {
        let take = |number| {
            vhost_daemon::inherited(number).map_err(|error| ToolError::Io("use a descriptor", error))
        };
        let backing = std::mem::take(&mut self.backing).into_iter();
        let files = Files {
            image: take(self.image)?,
            format: self.format,
            backing: backing
                .map(|(format, number)| Ok((format, take(number)?)))
                .collect::<Result<_, ToolError>>()?,
            options: OpenOptions {
                read_only: self.read_only,
                data_file: self.data_file.map(take).transpose()?.map(Arc::new),
                passphrase: self.key.map(passphrase).transpose()?,
                ..OpenOptions::default()
            },
            target: self.target.map(take).transpose()?,
        };
        Ok((Reports(take(self.control)?), files))
    }
}
