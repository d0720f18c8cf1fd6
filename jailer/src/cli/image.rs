//! `bulkhead image`: what people know from qemu-img, with the parsing in a jail.

mod words;

use super::values;
use crate::failure::Failure;
use crate::launch::image::{Access, Opened, Setting};
use crate::sandbox::SeccompMode;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use vm_spec::control::exit_code;
use vm_spec::image::{CheckResult, FromImageTool};
use vm_spec::size::ByteSize;
use vm_spec::spec::ImageFormat;

/// `check`'s exit codes, which are qemu-img's.
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;

/// The exit code of a wrong command line: that of `check` means something else.
pub(super) fn usage_code(arguments: &[OsString]) -> u8 {
    match arguments {
        [_, image, check, ..] if image == "image" && check == "check" => exit_code::ERROR,
        _ => exit_code::USAGE,
    }
}

/// `bulkhead image`'s verbs.
#[derive(Subcommand, Debug)]
pub(super) enum ImageVerb {
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
    Create {
        #[command(flatten)]
        image: ImageArgs,
        /// Size of the disk, such as 20G (default: the backing file's)
        size: Option<ByteSize>,
        /// The image that shows through where nothing was written, as the new image is to name it
        #[arg(long, short, value_name = "FILE", requires = "backing_format")]
        backing: Option<PathBuf>,
        /// Format of the backing file
        #[arg(long, short = 'F', value_name = "FORMAT", value_parser = parse_format)]
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

/// The image, and how to open it.
#[derive(Args, Debug)]
pub(super) struct ImageArgs {
    /// The image
    file: PathBuf,
    /// Its format: raw, qcow2, vmdk, vdi, vhdx or vhd (default: by its name; never by its content)
    #[arg(long, short, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<ImageFormat>,
    /// Folder that backing files may lie in, beside the image's own
    #[arg(long, value_name = "FOLDER")]
    image_folder: Vec<PathBuf>,
    /// File with the passphrase of an encrypted image, taken whole
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// What becomes of a system call that no policy allows: enforce, trap, log or off
    #[arg(long, value_name = "MODE", default_value_t = SeccompMode::Enforce, value_parser = values::seccomp(),
        hide_possible_values = true)]
    seccomp: SeccompMode,
}

#[derive(Args, Debug)]
pub(super) struct Shape {
    /// Bytes of a qcow2 cluster: a power of two from 512 to 2M
    #[arg(long, value_name = "SIZE")]
    cluster_size: Option<ByteSize>,
}

impl Shape {
    fn flag(&self) -> Result<Option<String>, Failure> {
        let Some(size) = self.cluster_size else {
            return Ok(None);
        };
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
pub(super) struct SnapshotAction {
    /// List them
    #[arg(long, short)]
    list: bool,
    /// Take one with this name
    #[arg(long, short, value_name = "NAME")]
    create: Option<String>,
    /// Make the disk what it was when this one, by id or name, was taken
    #[arg(long, short, value_name = "SNAPSHOT")]
    apply: Option<String>,
    /// Delete this one, by id or name
    #[arg(long, short, value_name = "SNAPSHOT")]
    delete: Option<String>,
}

fn parse_format(text: &str) -> Result<ImageFormat, String> {
    ImageFormat::named(text).ok_or_else(|| {
        let known = ImageFormat::ALL.map(ImageFormat::name).join(", ");
        format!("expected one of {known}")
    })
}

/// What a person called the file; the content is never looked at.
fn format_of(path: &Path, given: Option<ImageFormat>) -> Result<ImageFormat, Failure> {
    let by_name = || match path.extension().and_then(|name| name.to_str()) {
        Some("img") => Some(ImageFormat::Raw),
        Some(name) => ImageFormat::named(name),
        None => None,
    };
    given.or_else(by_name).ok_or_else(|| {
        Failure::usage(format!("the format of {} is not given", path.display()))
            .cause("it is never guessed from what is in the file")
            .hint("add --format=raw, --format=qcow2 or another (--help lists them)")
    })
}

impl ImageArgs {
    fn format(&self) -> Result<ImageFormat, Failure> {
        format_of(&self.file, self.format)
    }

    fn setting(&self) -> Setting {
        Setting {
            folders: self.image_folder.clone(),
            key_file: self.key_file.clone(),
            seccomp: self.seccomp,
        }
    }

    fn alone(&self, access: Access) -> Result<Opened, Failure> {
        Opened::alone(&self.file, self.format()?, access)
    }

    fn chain(&self, access: Access) -> Result<Opened, Failure> {
        Opened::chain(&self.setting(), &self.file, self.format()?, access)
    }

    /// Size of the disk that is open already.
    fn alone_again(&self, opened: &Opened) -> Result<u64, Failure> {
        Ok(opened.describe(&self.setting())?.info.virtual_size)
    }
}

/// Carries a verb out; the text to print and the exit code.
pub(super) fn carry_out(verb: &ImageVerb) -> Result<(String, u8), Failure> {
    match verb {
        ImageVerb::Info { image, json } => info(image, *json).map(|text| (text, 0)),
        ImageVerb::Check { image, repair, json } => check(image, *repair, *json),
        ImageVerb::Create {
            image,
            size,
            backing,
            backing_format,
            shape,
            lazy_refcounts,
        } => {
            let mut flags: Vec<String> = shape.flag()?.into_iter().collect();
            flags.extend(size.map(|size| format!("--size={}", size.0)));
            if *lazy_refcounts {
                flags.push("--lazy-refcounts".into());
            }
            let backing = backing.as_deref().zip(*backing_format);
            create(image, backing, flags)
        }
        ImageVerb::Convert {
            image,
            target,
            output_format,
            shape,
        } => convert(image, target, *output_format, shape),
        ImageVerb::Snapshot { image, action } => snapshot(image, action),
        ImageVerb::Resize { image, size, shrink } => resize(image, size, *shrink),
    }
}

fn info(image: &ImageArgs, as_json: bool) -> Result<String, Failure> {
    let format = image.format()?;
    let found = image.alone(Access::Read)?.describe(&image.setting())?;
    let used = std::fs::metadata(&image.file).map_or(0, |metadata| metadata.blocks() * 512);
    Ok(if as_json {
        format!("{:#}\n", words::info_json(&image.file, format, &found, used))
    } else {
        words::info_text(&image.file, format, &found, used)
    })
}

fn check(image: &ImageArgs, repair: bool, as_json: bool) -> Result<(String, u8), Failure> {
    let access = if repair { Access::Write } else { Access::Read };
    let flags: Vec<String> = repair.then(|| "--repair".to_owned()).into_iter().collect();
    let mut result = None;
    let opened = image.alone(access)?;
    opened.run(&image.setting(), "check", &flags, None, &mut |message| {
        if let FromImageTool::Checked(found) = message {
            result = Some(found);
        }
    })?;
    let result = result.ok_or_else(|| Failure::host("the image tool gave no answer"))?;
    let code = match &result {
        CheckResult { corruptions: 1.., .. } => CORRUPT,
        CheckResult { leaks: 1.., .. } => LEAKS,
        _ => 0,
    };
    let text = if as_json {
        let broken = result.broken.as_deref();
        format!(
            "{:#}\n",
            json!({
                "filename": image.file.display().to_string(), "format": image.format()?.name(),
                "check-errors": 0, "leaks": result.leaks, "corruptions": result.corruptions,
                "leaks-fixed": result.leaks_fixed, "corruptions-fixed": result.corruptions_fixed,
                "total-clusters": result.total_clusters, "allocated-clusters": result.allocated_clusters,
                "image-end-offset": result.image_end_offset, "broken": broken,
            })
        )
    } else {
        words::check_text(&result)
    };
    Ok((text, code))
}

fn create(
    image: &ImageArgs,
    backing: Option<(&Path, ImageFormat)>,
    mut flags: Vec<String>,
) -> Result<(String, u8), Failure> {
    let format = image.format()?;
    if backing.is_some() && format != ImageFormat::Qcow2 {
        return Err(Failure::usage("--backing: only a qcow2 image has a backing file"));
    }
    let below = backing
        .map(|(name, format)| {
            let text = name
                .to_str()
                .ok_or_else(|| Failure::usage("--backing: the name is not UTF-8"))?;
            flags.push(format!("--backing-name={}:{text}", format.name()));
            // As whoever opens the new image will see the name.
            let folder = image.file.parent().unwrap_or(Path::new(""));
            Opened::chain(&image.setting(), &folder.join(name), format, Access::Read)
        })
        .transpose()?;
    if below.is_none() && !flags.iter().any(|flag| flag.starts_with("--size=")) {
        return Err(Failure::usage("neither a size nor a backing file is given"));
    }
    let new = Opened::new_file(&image.file, format)?;
    let all = match below {
        Some(below) => new.on(below),
        None => new,
    };
    let made = all.run(&image.setting(), "create", &flags, None, &mut |_| {});
    made.inspect_err(|_| all.discard()).map(|()| (String::new(), 0))
}

fn convert(
    image: &ImageArgs,
    target: &Path,
    format: Option<ImageFormat>,
    shape: &Shape,
) -> Result<(String, u8), Failure> {
    let format = format_of(target, format)?;
    let flags: Vec<String> = shape.flag()?.into_iter().collect();
    let source = image.chain(Access::Read)?;
    let new = Opened::new_file(target, format)?;
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        bar.set_style(style);
    }
    let converted = source.run(&image.setting(), "convert", &flags, Some(&new), &mut |message| {
        if let FromImageTool::Progress { done, total } = message {
            bar.set_length(total);
            bar.set_position(done);
        }
    });
    bar.finish_and_clear();
    converted
        .inspect_err(|_| new.discard())
        .map(|()| (String::new(), 0))
}

fn snapshot(image: &ImageArgs, action: &SnapshotAction) -> Result<(String, u8), Failure> {
    let given = [
        ("take", &action.create),
        ("apply", &action.apply),
        ("delete", &action.delete),
    ];
    for (flag, name) in given {
        if let Some(name) = name {
            let opened = image.alone(Access::Write)?;
            opened.run(
                &image.setting(),
                "snapshot",
                &[format!("--{flag}={name}")],
                None,
                &mut |_| {},
            )?;
            return Ok((String::new(), 0));
        }
    }
    let found = image.alone(Access::Read)?.describe(&image.setting())?;
    Ok((words::snapshot_text(&found), 0))
}

fn resize(image: &ImageArgs, size: &str, shrink: bool) -> Result<(String, u8), Failure> {
    let bad = || Failure::usage(format!("{size} is no size")).hint("write 20G, +5G or -5G");
    let (sign, digits) = match size.strip_prefix(['+', '-']) {
        Some(rest) => (&size[..1], rest),
        None => ("", size),
    };
    let amount = digits.parse::<ByteSize>().map_err(|e| bad().because(&e))?.0;
    let opened = image.chain(Access::Write)?;
    let new = match sign {
        "" => amount,
        sign => {
            let now = image.alone_again(&opened)?;
            let changed = if sign == "+" {
                now.checked_add(amount)
            } else {
                now.checked_sub(amount)
            };
            changed.ok_or_else(bad)?
        }
    };
    let mut flags = vec![format!("--size={new}")];
    flags.extend(shrink.then(|| "--shrink".to_owned()));
    opened.run(&image.setting(), "resize", &flags, None, &mut |_| {})?;
    Ok((String::new(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_taken_from_the_name_alone() {
        let of = |name: &str| format_of(Path::new(name), None);
        assert_eq!(of("a.img").unwrap(), ImageFormat::Raw);
        assert_eq!(of("a.vpc").unwrap(), ImageFormat::Vhd);
        assert!(of("a").unwrap_err().to_string().contains("never guessed"));
        assert!(of("a.tar").is_err());
    }
}
