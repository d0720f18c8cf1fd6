//! What `bulkhead image info` and `check` print.

use crate::launch::image::Described;
use crate::tell::printable;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::path::Path;
use vm_spec::image::CheckResult;
use vm_spec::size::ByteSize;
use vm_spec::spec::ImageFormat;

/// The names are those of `qemu-img info --output=json`.
pub(super) fn info_json(path: &Path, format: ImageFormat, found: &Described, used: u64) -> Value {
    let mut all = Map::new();
    let mut put = |name: &str, value: Value| all.insert(name.to_owned(), value);
    put("filename", json!(path.display().to_string()));
    put("format", json!(qemu_name(format)));
    put("virtual-size", json!(found.info.virtual_size));
    put("actual-size", json!(used));
    put(
        "dirty-flag",
        json!(found.info.qcow2.as_ref().is_some_and(|q| q.dirty)),
    );
    if let Some(qcow2) = &found.info.qcow2 {
        put("cluster-size", json!(qcow2.cluster_size));
        if qcow2.encrypted {
            put("encrypted", json!(true));
        }
        if let Some(name) = &qcow2.backing_file {
            put("backing-filename", json!(String::from_utf8_lossy(name)));
        }
        if let Some(name) = &qcow2.backing_format {
            put("backing-filename-format", json!(name));
        }
        let mut data = json!({ "compat": compat(qcow2.version), "refcount-bits": qcow2.refcount_bits,
            "compression-type": qcow2.compression });
        if qcow2.version >= 3 {
            data["lazy-refcounts"] = json!(qcow2.lazy_refcounts);
            data["corrupt"] = json!(qcow2.corrupt);
            data["extended-l2"] = json!(qcow2.extended_l2);
        }
        if let Some(raw) = qcow2.data_file_raw {
            data["data-file"] = json!(qcow2.data_file);
            data["data-file-raw"] = json!(raw);
        }
        put("format-specific", json!({ "type": "qcow2", "data": data }));
    }
    let snapshots = snapshots_json(found);
    if !snapshots.is_empty() {
        put("snapshots", json!(snapshots));
    }
    Value::Object(all)
}

/// The internal snapshots, as they are among what [`info_json`] says.
pub(super) fn snapshots_json(found: &Described) -> Vec<Value> {
    let snapshots = found.snapshots.iter().map(|snapshot| {
        json!({
            "id": snapshot.id, "name": snapshot.name, "vm-state-size": snapshot.vm_state_size,
            "date-sec": snapshot.date_sec, "date-nsec": snapshot.date_nsec,
            "vm-clock-sec": snapshot.vm_clock_nsec / 1_000_000_000,
            "vm-clock-nsec": snapshot.vm_clock_nsec % 1_000_000_000,
        })
    });
    snapshots.collect()
}

/// QEMU's name of a format.
fn qemu_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Vhd => "vpc",
        other => other.name(),
    }
}

fn compat(version: u32) -> &'static str {
    if version == 2 { "0.10" } else { "1.1" }
}

/// For people.
pub(super) fn info_text(path: &Path, format: ImageFormat, found: &Described, used: u64) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "{name}: {value}");
    };
    line("image", path.display().to_string());
    line("file format", qemu_name(format).into());
    line(
        "virtual size",
        format!(
            "{} ({} bytes)",
            ByteSize(found.info.virtual_size),
            found.info.virtual_size
        ),
    );
    line("disk size", format!("{used} bytes"));
    if let Some(qcow2) = &found.info.qcow2 {
        line("cluster_size", qcow2.cluster_size.to_string());
        if let Some(name) = &qcow2.backing_file {
            line("backing file", printable(&String::from_utf8_lossy(name)));
        }
        if let Some(name) = &qcow2.backing_format {
            line("backing file format", printable(name));
        }
        line("compat", compat(qcow2.version).into());
        line("compression type", qcow2.compression.clone());
        line("lazy refcounts", qcow2.lazy_refcounts.to_string());
        line("refcount bits", qcow2.refcount_bits.to_string());
        line("extended l2", qcow2.extended_l2.to_string());
        line("encrypted", qcow2.encrypted.to_string());
        line("dirty", qcow2.dirty.to_string());
        line("corrupt", qcow2.corrupt.to_string());
        if let Some(raw) = qcow2.data_file_raw {
            let name = qcow2.data_file.as_deref().unwrap_or("not named");
            line("data file", printable(name));
            line("data file raw", raw.to_string());
        }
    }
    if !found.snapshots.is_empty() {
        out.push_str(&snapshot_text(found));
    }
    out
}

/// The internal snapshots, for people.
pub(super) fn snapshot_text(found: &Described) -> String {
    let mut out = String::from("snapshots:\n  id  date (UTC)           vm state  name\n");
    for snapshot in &found.snapshots {
        let _ = writeln!(
            out,
            "  {:<3} {}  {:>8}  {}",
            printable(&snapshot.id),
            date(snapshot.date_sec),
            snapshot.vm_state_size,
            printable(&snapshot.name),
        );
    }
    out
}

/// Year, month, day and time of a second since 1970 in UTC (days to date as in the Gregorian calendar's
/// cycle of 400 years, which starts with March).
fn date(seconds: u32) -> String {
    let days = i64::from(seconds / 86_400) + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, (month + 2) % 12 + 1);
    let year = year + cycle * 400 + i64::from(month <= 2);
    let time = seconds % 86_400;
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02}:{:02}",
        time / 3600,
        time / 60 % 60,
        time % 60
    )
}

/// What a check found, for people.
pub(super) fn check_text(result: &CheckResult) -> String {
    let mut out = String::new();
    if result.leaks_fixed + result.corruptions_fixed > 0 {
        let _ = writeln!(
            out,
            "mended: {} leaked clusters, {} errors",
            result.leaks_fixed, result.corruptions_fixed
        );
    }
    if let Some(broken) = &result.broken {
        let _ = writeln!(out, "{}", printable(broken));
    }
    let _ = match (result.corruptions, result.leaks) {
        (0, 0) => writeln!(out, "no errors were found on the image"),
        (0, leaks) => writeln!(out, "{leaks} leaked clusters: space is lost, data is not"),
        (errors, leaks) => writeln!(out, "{errors} errors, {leaks} leaked clusters: data may be lost"),
    };
    let _ = writeln!(
        out,
        "{} of {} clusters are allocated; the image ends at {}",
        result.allocated_clusters, result.total_clusters, result.image_end_offset
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(u32::MAX), "2106-02-07 06:28:15");
    }
}
