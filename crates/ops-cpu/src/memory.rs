//! Aligned, lazily committed memory, and the cells through which tasks of one fork share it.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ptr::NonNull;

use ops::Error;

/// Cache line, and width of one AVX-512 vector.
pub const LINE_BYTES: usize = 64;

/// Bytes that may be read, but mean nothing, after the last byte of every [`Buffer`]: kernels read whole vectors.
const OVERREAD_BYTES: usize = 256;

/// Zeroed memory of `T`, aligned to pages and committed by the system when first touched, on huge pages where the
/// system has them: without those, streaming weights spends a tenth of its time on address translation.
#[derive(Debug)]
pub struct Buffer<T: Plain> {
    start: NonNull<u8>,
    len: usize,
    mapped_bytes: usize,
    element: PhantomData<T>,
}

/// Types for which all bits zero, and any other bits, are a value, and which own nothing.
///
/// # Safety
/// Any bit pattern must be a valid value.
pub unsafe trait Plain: Copy + 'static {}

// SAFETY: any four bytes are an f32.
unsafe impl Plain for f32 {}
// SAFETY: any byte is a u8.
unsafe impl Plain for u8 {}

// SAFETY: a buffer owns its mapping as a Box would; `Plain` elements have no thread affinity.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeroed elements. `what` names them in the error.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Self, Error> {
        let out_of_memory =
            || Error::OutOfMemory { what, bytes: (len as u64).saturating_mul(size_of::<T>() as u64) };
        let bytes = len.checked_mul(size_of::<T>()).and_then(|b| b.checked_add(OVERREAD_BYTES));
        let mapped_bytes = bytes.filter(|&b| b <= isize::MAX as usize).ok_or_else(out_of_memory)?;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(out_of_memory());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(out_of_memory)?;
        #[cfg(target_os = "linux")]
        // SAFETY: the range was just mapped; the call is only advice, and its failure leaves ordinary pages.
        unsafe {
            libc::madvise(start.as_ptr().cast(), mapped_bytes, libc::MADV_HUGEPAGE);
        }
        Ok(Buffer { start, len, mapped_bytes, element: PhantomData })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// First element.
    pub fn as_ptr(&self) -> *const T {
        self.start.as_ptr().cast()
    }

    /// First element.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.start.as_ptr().cast()
    }

    /// All elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `len` elements are mapped and initialised (zero at first); any bits are a `T`.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    /// All elements.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as for `as_slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `zeroed` mapped; nothing borrows it any more.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.mapped_bytes);
        }
    }
}

/// A pointer that the tasks of one fork share. Each use says why no two tasks touch the same element.
#[derive(Debug)]
pub struct Shared<T>(pub *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: sending the address is harmless; every dereference is an unsafe block of its own.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer, `count` elements on.
    ///
    /// # Safety
    /// As for pointer addition: the result stays in the same allocation.
    #[inline(always)]
    pub unsafe fn at(self, count: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(count) }
    }
}

/// One value per thread of the pool.
#[derive(Debug)]
pub struct PerThread<T>(Vec<UnsafeCell<T>>);

// SAFETY: `get` hands out pointers; whoever dereferences one vouches that it is the running thread's.
unsafe impl<T: Send> Sync for PerThread<T> {}

impl<T> PerThread<T> {
    /// `threads` values made by `make`.
    pub fn new(threads: usize, mut make: impl FnMut() -> T) -> Self {
        PerThread((0..threads).map(|_| UnsafeCell::new(make())).collect())
    }

    /// Number of threads.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The values, while no thread runs.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().map(UnsafeCell::get_mut)
    }

    /// The value of `thread`, for that thread alone.
    pub fn get(&self, thread: usize) -> *mut T {
        self.0[thread].get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_zeroed_and_aligned() {
        let mut b = Buffer::<f32>::zeroed(1000, "test").unwrap();
        assert!(b.as_slice().iter().all(|&v| v == 0.0));
        assert_eq!(b.as_ptr() as usize % LINE_BYTES, 0);
        b.as_mut_slice()[999] = 1.0;
        assert_eq!((b.len(), b.as_slice()[999]), (1000, 1.0));
    }

    #[test]
    fn the_impossible_is_an_error() {
        let error = Buffer::<f32>::zeroed(usize::MAX / 2, "weights").unwrap_err();
        assert!(error.to_string().contains("weights"), "{error}");
        assert!(Buffer::<u8>::zeroed(1 << 60, "pool").is_err());
    }
}
