//! Bytes into output files: positioned writes, and copies that the kernel makes by itself.

use std::fs::File;
use std::io;
use std::ops::Range;

use lora_format::io::mmap::Mapping;

/// Writes all of `bytes` at `offset`; threads may write different places of one file at once.
pub(super) fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileExt;
        file.write_all_at(bytes, offset)
    }
    #[cfg(windows)]
    {
        use std::os::windows::fs::FileExt;
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let written = file.seek_write(rest, at)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = &rest[written..];
            at += written as u64;
        }
        Ok(())
    }
}

/// Copies `range` of a file, which `mapping` maps, to `offset` of `output`: inside the kernel
/// where file systems allow it (then blocks may be shared), else through the mapping.
pub(super) fn copy_range(
    source: &File,
    mapping: &Mapping,
    range: Range<usize>,
    output: &File,
    offset: u64,
) -> io::Result<()> {
    let copied = copy_in_kernel(source, range.clone(), output, offset)?;
    if copied < range.len() {
        let rest = range.start + copied..range.end;
        mapping.populate(rest.clone());
        write_at(output, &mapping[rest.clone()], offset + copied as u64)?;
        mapping.release(rest);
    }
    Ok(())
}

/// Copies as much as the kernel can by itself, and says how much that was.
#[cfg(target_os = "linux")]
fn copy_in_kernel(
    source: &File,
    range: Range<usize>,
    output: &File,
    offset: u64,
) -> io::Result<usize> {
    use rustix::io::Errno;
    let mut from = range.start as u64;
    let mut to = offset;
    while from < range.end as u64 {
        let left = range.end - from as usize;
        match rustix::fs::copy_file_range(source, Some(&mut from), output, Some(&mut to), left) {
            // The end of the source: it became shorter. The mapping's owner will notice.
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            // Different file systems, or one that cannot do this; or a fault such as a full disk,
            // which the plain write will meet again and report.
            Err(_) => break,
        }
    }
    Ok(from as usize - range.start)
}

#[cfg(not(target_os = "linux"))]
fn copy_in_kernel(_: &File, _: Range<usize>, _: &File, _: u64) -> io::Result<usize> {
    Ok(0)
}
