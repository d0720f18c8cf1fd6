//! `bulkhead image`: what people know from qemu-img, with the parsing in a jail.

mod args;
mod words;

use super::bar::Bar;
use crate::failure::Failure;
use crate::launch::image::{Access, Key, Opened, Setting, open_key};
use crate::launch::warn_of;
pub(super) use args::ImageVerb;
use args::{ImageArgs, Shape, SnapshotAction};
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
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

/// What a person called the file; the content is never looked at.
/// `flag` is the one that says it.
fn format_of(path: &Path, given: Option<ImageFormat>, flag: &str) -> Result<ImageFormat, Failure> {
    let by_name = || match path.extension().and_then(|name| name.to_str()) {
        Some("img") => Some(ImageFormat::Raw),
        Some(name) => ImageFormat::named(name),
        None => None,
    };
    given.or_else(by_name).ok_or_else(|| {
        Failure::usage(format!("the format of {} is not given", path.display()))
            .cause("it is never guessed from what is in the file")
            .hint(format!(
                "add {flag}=raw, {flag}=qcow2 or another (--help lists them)"
            ))
    })
}

impl ImageArgs {
    fn format(&self) -> Result<ImageFormat, Failure> {
        format_of(&self.file, self.format, "--format")
    }

    /// Once for a verb: what a pipe holds is read here.
    fn setting(&self) -> Result<Setting, Failure> {
        let key = match (&self.key_file, self.key_fd) {
            (Some(path), _) => Some(Key::File(path.clone())),
            (None, number) => number.map(Key::Inherited),
        };
        Ok(Setting {
            folders: self.image_folder.clone(),
            key: key.map(|key| open_key("--", &key)).transpose()?,
            seccomp: self.seccomp,
        })
    }

    fn alone(&self, access: Access) -> Result<Opened, Failure> {
        Opened::alone(&self.file, self.format()?, access)
    }

    fn chain(&self, setting: &Setting, access: Access) -> Result<Opened, Failure> {
        Opened::chain(setting, &self.file, self.format()?, access)
    }
}

/// A [`Bar`]'s words where tables of an image are walked through.
const TABLES: &str = "{pos}/{len} tables {eta}";

fn show(bar: &Bar, message: &FromImageTool) {
    if let FromImageTool::Progress { done, total } = message {
        bar.show(*done, *total);
    }
}

/// Carries a verb out; the text to print and the exit code.
pub(super) fn carry_out(verb: &ImageVerb) -> Result<(String, u8), Failure> {
    warn_of(verb.image().seccomp);
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
            let format = image.format()?;
            if *lazy_refcounts && format != ImageFormat::Qcow2 {
                return Err(Failure::usage(
                    "--lazy-refcounts: only a qcow2 image counts references",
                ));
            }
            let mut flags: Vec<String> = shape.flag(format)?.into_iter().collect();
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
            data_file,
            output_format,
            shape,
        } => convert(image, data_file.as_deref(), (target, *output_format), shape),
        ImageVerb::Snapshot { image, action, json } => snapshot(image, action, *json),
        ImageVerb::Resize { image, size, shrink } => resize(image, size, *shrink),
    }
}

fn info(image: &ImageArgs, as_json: bool) -> Result<String, Failure> {
    let format = image.format()?;
    let found = image.alone(Access::Read)?.describe(&image.setting()?)?;
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
    let bar = Bar::new(TABLES);
    opened.run(&image.setting()?, "check", &flags, None, &mut |message| {
        show(&bar, &message);
        if let FromImageTool::Checked(found) = message {
            result = Some(found);
        }
    })?;
    drop(bar);
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
    if image.key_file.is_some() || image.key_fd.is_some() {
        return Err(
            Failure::usage("--key-file, --key-fd: an encrypted image cannot be created")
                .hint("make it with qemu-img create -f qcow2 -o encrypt.format=luks,..."),
        );
    }
    if backing.is_some() && format != ImageFormat::Qcow2 {
        return Err(Failure::usage("--backing: only a qcow2 image has a backing file"));
    }
    if backing.is_none() && !image.image_folder.is_empty() {
        return Err(Failure::usage("--image-folder: goes with --backing"));
    }
    let setting = image.setting()?;
    let below = backing
        .map(|(name, format)| {
            let text = name
                .to_str()
                .ok_or_else(|| Failure::usage("--backing: the name is not UTF-8"))?;
            flags.push(format!("--backing-name={}:{text}", format.name()));
            Opened::backing_of(&setting, &image.file, text, format)
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
    let made = all.run(&setting, "create", &flags, None, &mut |_| {});
    all.conclude(made).map(|()| (String::new(), 0))
}

fn convert(
    image: &ImageArgs,
    data_file: Option<&Path>,
    (target, format): (&Path, Option<ImageFormat>),
    shape: &Shape,
) -> Result<(String, u8), Failure> {
    let format = format_of(target, format, "--output-format")?;
    let flags: Vec<String> = shape.flag(format)?.into_iter().collect();
    let setting = image.setting()?;
    let mut source = image.chain(&setting, Access::Read)?;
    if let Some(path) = data_file {
        if image.format()? != ImageFormat::Qcow2 {
            return Err(Failure::usage("--data-file: only a qcow2 image has one"));
        }
        source = source.with_data_file(path)?;
    }
    let new = Opened::new_file(target, format)?;
    let bar = Bar::new("{bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let converted = source.run(&setting, "convert", &flags, Some(&new), &mut |message| {
        show(&bar, &message);
    });
    drop(bar);
    new.conclude(converted).map(|()| (String::new(), 0))
}

fn snapshot(image: &ImageArgs, action: &SnapshotAction, as_json: bool) -> Result<(String, u8), Failure> {
    let given = [
        ("take", &action.create),
        ("apply", &action.apply),
        ("delete", &action.delete),
    ];
    for (flag, name) in given {
        if let Some(name) = name {
            let opened = image.alone(Access::Write)?;
            let (bar, flags) = (Bar::new(TABLES), [format!("--{flag}={name}")]);
            opened.run(&image.setting()?, "snapshot", &flags, None, &mut |message| {
                show(&bar, &message);
            })?;
            return Ok((String::new(), 0));
        }
    }
    let found = image.alone(Access::Read)?.describe(&image.setting()?)?;
    let text = match as_json {
        true => format!("{:#}\n", json!(words::snapshots_json(&found))),
        false => words::snapshot_text(&found),
    };
    Ok((text, 0))
}

fn resize(image: &ImageArgs, size: &str, shrink: bool) -> Result<(String, u8), Failure> {
    let bad = || Failure::usage(format!("{size} is no size")).hint("write 20G, +5G or -5G");
    let (sign, digits) = match size.strip_prefix(['+', '-']) {
        Some(rest) => (&size[..1], rest),
        None => ("", size),
    };
    let amount = digits.parse::<ByteSize>().map_err(|e| bad().because(&e))?.0;
    let setting = image.setting()?;
    let opened = image.chain(&setting, Access::Write)?;
    let new = match sign {
        "" => amount,
        sign => {
            let now = opened.describe(&setting)?.info.virtual_size;
            let changed = if sign == "+" {
                now.checked_add(amount)
            } else {
                now.checked_sub(amount)
            };
            changed.ok_or_else(|| {
                Failure::usage(format!("{size} is no change that this disk can make"))
                    .cause(format!("it has {} ({now} bytes)", ByteSize(now)))
            })?
        }
    };
    let mut flags = vec![format!("--size={new}")];
    flags.extend(shrink.then(|| "--shrink".to_owned()));
    opened.run(&setting, "resize", &flags, None, &mut |_| {})?;
    Ok((String::new(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_taken_from_the_name_alone() {
        let of = |name: &str| format_of(Path::new(name), None, "--output-format");
        assert_eq!(of("a.img").unwrap(), ImageFormat::Raw);
        assert_eq!(of("a.vpc").unwrap(), ImageFormat::Vhd);
        let unknown = of("a").unwrap_err().to_string();
        assert!(unknown.contains("never guessed") && unknown.contains("add --output-format=raw"));
        assert!(of("a.tar").is_err());
    }
}
